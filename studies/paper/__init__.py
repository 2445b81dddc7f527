"""The paper's tables and figures: its runs, ours at a smaller scale, and one report of both."""
