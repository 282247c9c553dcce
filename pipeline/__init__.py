"""Settings, Spark, artifacts, tracking, and the jobs that join the rooms."""
