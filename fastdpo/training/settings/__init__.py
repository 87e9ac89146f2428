"""What a run is told: ``PreferenceConfig``, its checks, and the command line's arguments. Plain data."""
