"""Workers compute leases of tasks, a parameter server owns x, a scheduler hands out the work."""
