"""Is this machine, as it is now, fit to measure on? `python -m workers.selfcheck`."""
