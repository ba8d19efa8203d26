"""The web page of a service: chat with its models side by side, and blind votes. Served on this machine alone.

The browser talks to a small server in the client's process, which holds the service's token and asks the service. So the token never
reaches a browser, and a service needs no route for pages or votes.
"""

from palate.web.server import WebUI as WebUI
