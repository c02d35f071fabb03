// What the files of the C++ tests share: a program that counts what passes and prints what fails.
#pragma once

#include <string>

void count_result(const std::string& call, const std::string& problem);  // problem: empty, or a sentence

void test_tiles();  // test_tiles.cpp
