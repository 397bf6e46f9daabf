"""Running whole profiles: notebooks, plans, jobs, downloads."""
