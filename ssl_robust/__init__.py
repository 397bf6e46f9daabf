"""ssl_robust: adversarial robustness of frozen self-supervised encoders on three downstream tasks."""

__version__ = "0.1.0"
