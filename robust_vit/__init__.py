"""robust_vit: how robust is this vision model, against what, and why?"""

__version__ = "0.1.0"
