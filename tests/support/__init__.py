"""What tests of several folders stand on: fakes, servers in processes of their own, whole arenas, logs told again."""
