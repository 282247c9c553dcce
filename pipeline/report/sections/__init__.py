"""What each section of the report shows, from the folder and the record of its stage. A missing or damaged file raises."""
