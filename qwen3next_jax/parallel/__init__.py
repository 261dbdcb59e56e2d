"""How arrays and work are divided among devices and processes."""
