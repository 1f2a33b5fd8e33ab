"""The only place that imports ray: jobs on a cluster."""
