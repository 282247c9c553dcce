"""What people read of a run: the report, comparisons, audits, the summary."""
