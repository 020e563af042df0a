"""Do BASE and INSTRUCT belong together?"""
