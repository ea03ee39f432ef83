import sys

from unclip.cli.main import main

sys.exit(main())
