"""What each job's config may say: the models that YAML files are validated against."""
