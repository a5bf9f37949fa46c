"""`python -m trexport.cli`"""

from trexport.cli import main

main()
