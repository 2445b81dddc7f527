"""The schedules: alpha(l, t) by formula, table or function; steps to samples and tokens."""
