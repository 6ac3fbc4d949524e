"""Tests of every part."""
