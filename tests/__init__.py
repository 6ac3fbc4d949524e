"""Tests of every part; modules here that are not tests are fakes that several tests share."""
