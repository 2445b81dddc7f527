"""What of a run is measured, only where a flag asks for it: docs/measurements.md."""
