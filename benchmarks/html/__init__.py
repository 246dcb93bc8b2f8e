"""report.html: one page of a result, which needs no network and no other file."""
