"""Measurements of Tiltyard against its limits and its peers, each as a ratio taken in one run."""
