"""What a run will cost, before any machine is paid for."""
