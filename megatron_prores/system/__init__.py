"""Files, processes, and the machine and launcher around a run."""
