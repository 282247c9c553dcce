"""What each section of the report shows, read from the stage's own files. A missing or damaged file raises."""
