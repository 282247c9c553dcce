"""The annotation job: a teacher labels pairs, as a Spark job over engines."""
