"""One run: checked beforehand, trained request by request, measured, mirrored, measured again."""
