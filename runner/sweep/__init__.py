"""Where runs are sent to, when they do not run here and now."""
