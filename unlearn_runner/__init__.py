"""unlearn_runner: make a generative image model forget, and measure what it forgot, kept and cost."""

__version__ = "0.1.0"
