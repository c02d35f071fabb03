from ssltrain.cli import main

main()
