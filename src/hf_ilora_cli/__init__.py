"""The command `hf-ilora`.

It is a package of its own because `import hf_ilora` imports torch, which takes seconds: nothing here imports torch or
hf_ilora before a recipe starts.
"""
