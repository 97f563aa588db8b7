"""What both sides agree on about models: backbone, features, head, tasks, export."""
