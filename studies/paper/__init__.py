"""The paper's experiments (arXiv 2603.05369): their settings and what came out of them."""
