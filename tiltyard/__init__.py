"""Tiltyard: an open arena for machine-learning models that anyone can host and check."""
