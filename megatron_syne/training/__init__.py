"""The loop. ``trainer`` gets its parts handed in; saving, watching and stopping are callbacks."""
