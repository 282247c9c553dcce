"""Any source of query-ad pairs becomes one checked table with leak-free splits."""
