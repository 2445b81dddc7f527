"""What was measured once and can be measured again, outside of the package."""
