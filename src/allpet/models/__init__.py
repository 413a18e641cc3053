"""Networks. Nothing here knows noise schedules or training recipes."""
