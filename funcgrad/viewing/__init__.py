"""Graphs for people and other tools.

schema    a graph as plain data: nodes, values, edges; to_json
boxes     the assignment of equations to the boxes of their scopes
page      show: one HTML file with that data and the viewer in assets
graphviz  to_dot
diff      diff: the equations that two graphs do not share
"""
