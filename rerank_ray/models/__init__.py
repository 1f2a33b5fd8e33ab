"""Models behind calls: what each backend answers, and how it runs on a device."""
