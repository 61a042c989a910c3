"""From a plug to a service: personas of many users in a store, engines that answer, a server in front of them."""
