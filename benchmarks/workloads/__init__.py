"""Requests to run: forests of turns, built-in workloads, and their sizes."""
