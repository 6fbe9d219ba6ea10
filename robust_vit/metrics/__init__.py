"""Numbers from outputs, and the statistics that say how sure they are."""
