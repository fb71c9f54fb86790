"""The command `hf-ilora`.

It is a separate package because `import hf_ilora` imports torch, which takes seconds: nothing here imports torch or
hf_ilora before a recipe starts.
"""
