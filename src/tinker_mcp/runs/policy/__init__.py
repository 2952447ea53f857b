"""What rl and distillation share: sampled groups, where they come from, the teacher, the drift."""
