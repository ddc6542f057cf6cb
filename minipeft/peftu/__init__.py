"""The PEFT-U protocol: baselines, methods, metrics and audits (Clarke, Heng, Tang, Mars 2024, arXiv:2407.18078)."""
