"""Devices and who holds what."""
