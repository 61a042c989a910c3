"""What a persona plug has to beat: other ways to use a history, with the same frozen backbone."""
