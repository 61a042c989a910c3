"""Where plugs are shared: finding the files of a plug on disk, in the cache or on the Hub, and pushing them."""
