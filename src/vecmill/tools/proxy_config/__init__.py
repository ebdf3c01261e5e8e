"""`vecmill proxy-config`: a configuration of HAProxy or nginx for several servers. The templates are its text."""
