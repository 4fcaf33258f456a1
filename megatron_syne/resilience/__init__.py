"""Stopping without loss: ``signals`` (save and leave on SIGTERM or SIGUSR1) and ``run_lock`` (one run a folder)."""
