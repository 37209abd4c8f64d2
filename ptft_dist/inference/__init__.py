"""Uses of trained models on the terminal: text, chats, scores."""
