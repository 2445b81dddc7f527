"""What a run of ProRes is configured by: ProResConfig, norm placements, and their flags."""
